"""From an instruction to a description: the prompt for a language model (DescriptiveEdit, 2508.20505)."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "descriptive edit/text"
# The begin and end marks are two of them; of CLIP's tokens, ordinary English needs about 1.3 a word.
MARKS, WORDS_PER_TOKEN = 2, 0.75

LOOK = "The picture is attached; describe it as it looks after the edit."
KEEP = (
    "The picture shows now: {source}\n"
    "Keep the words of that description, and their order, wherever they still hold after the edit."
)
PROMPT = """\
Someone asks for an edit of a picture. Write a description of the finished picture for a text-to-image model.

{known}
The edit: {instruction}

Rules:
- Describe only the final look, as if the picture had always been so. Never speak of the edit or of what is \
gone: no "change", "replace", "add", "remove", "now", "instead", "no longer", "without".
- Name the main subject first, then what the edit asks for, then the setting, the light and the style.
- At most {words} words of plain English, in the present tense.
- Answer with the description alone: no heading, quotation marks, brackets, list or explanation."""


def describe_prompt(instruction: str, source: str = "", max_tokens: int = 77) -> str:
    """The prompt that makes a language model turn `instruction` into an edit description.

    It demands the final look only, as in the descriptions of DescriptiveEdit's training, within `max_tokens`
    CLIP tokens. With a `source` description its words are kept where they still apply, so that only the words
    of the edit differ. Without one the model is told to look at the image.
    Raises ValueError for an empty instruction.
    """
    instruction, source = " ".join(instruction.split()), " ".join(source.split())
    if not instruction:
        raise ValueError("instruction is empty: type what to change, such as make it winter")
    known = KEEP.format(source=source) if source else LOOK
    words = int((max_tokens - MARKS) * WORDS_PER_TOKEN)
    return PROMPT.format(known=known, instruction=instruction, words=words)


class DescEditDescribePrompt(io.ComfyNode):
    """Node: `describe_prompt`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditDescribePrompt",
            display_name="Instruction to Description (prompt)",
            category=CATEGORY,
            description=(
                "Writes a prompt that makes a language model turn an instruction (make it winter) into an "
                "edit description (a street in deep snow): only the final look, short enough for CLIP. Wire "
                "it to Generate Text, and that node's text to where the edit description goes."
            ),
            search_aliases=[
                *("2508.20505", "instruction", "LLM", "MLLM"),
                *("prompt enhance", "InstructPix2Pix", "rewrite prompt"),
            ],
            inputs=[
                io.String.Input(
                    "instruction",
                    multiline=True,
                    tooltip="What to change, in any words, such as: make it winter. Not empty.",
                ),
                io.String.Input(
                    "source_description",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What the image shows now. Words that still apply are kept, which UnifyEdit "
                    "needs. Empty: the language model must see the image, through the image input of "
                    "Generate Text.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=77,
                    min=16,
                    max=512,
                    optional=True,
                    advanced=True,
                    tooltip="Maximum length of the description in CLIP tokens, both end marks included, 16 "
                    "to 512. 77 is what SD1.5 reads at once and the limit of UnifyEdit. Low values give "
                    "less detail.",
                ),
            ],
            outputs=[io.String.Output("prompt", tooltip="For the prompt input of Generate Text.")],
        )

    @classmethod
    def execute(cls, instruction: str, source_description: str = "", max_tokens: int = 77) -> io.NodeOutput:
        return io.NodeOutput(describe_prompt(instruction, source_description, max_tokens))


NODES = [DescEditDescribePrompt]
