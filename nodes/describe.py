"""Nodes for descriptions: encoding, finding the words of an edit, and turning an instruction into one."""

from __future__ import annotations

from comfy.sd import CLIP
from comfy_api.latest import io

from ..models.tiny_studio.studio import unknown_words
from ..patches.unify.tokens import EditTokens, find_tokens
from .inversion import ALIASES
from .inversion import CATEGORY as UNIFY
from .previews import show_text

CATEGORY = "descriptive edit/text"
EditTokensType = io.Custom("DESCEDIT_EDIT_TOKENS")
_CLIP = io.Clip.Input("clip", tooltip="The model's text encoder.")
_SOURCE = "What the image shows now. Not empty, at most 75 tokens."
_EDIT = (
    "What the edited image shows. Not empty, at most 75 tokens. Its words must differ from the source "
    "description, unless some are named in words. Weights such as (red:1.3) and embedding:name are allowed."
)
_WORDS = io.String.Input(
    "words",
    default="",
    optional=True,
    placeholder="words that carry the edit (empty: those that differ)",
    tooltip="Words or phrases of the edit description that carry the edit, separated by commas. Empty: the "
    "words that differ from the source description, or, if words are only removed, their neighbours. "
    "Punctuation, case and weights do not count.",
)
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


class DescEditDescribe(io.ComfyNode):
    """Node: both texts encoded as the host does, and `patches.unify.tokens.find_tokens`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditDescribe",
            display_name="Describe Edit",
            category=UNIFY,
            description=(
                "Takes a description of the image and one of the result, encodes both, and finds the words "
                "that carry the edit. For UnifyEdit and Find Edit Mask."
            ),
            search_aliases=[*ALIASES, "prompt", "CLIP Text Encode", "edit by description"],
            inputs=[
                _CLIP,
                io.String.Input(
                    "source_description",
                    multiline=True,
                    placeholder="source description: what the image shows now",
                    tooltip=f"{_SOURCE} Empty: the connected source_text is used.",
                ),
                io.String.Input(
                    "edit_description",
                    multiline=True,
                    placeholder="edit description: the same, with only the words of the edit changed",
                    tooltip=f"{_EDIT} Empty: the connected edit_text is used.",
                ),
                _WORDS,
                *(
                    io.String.Input(
                        f"{name}_text",
                        optional=True,
                        force_input=True,
                        tooltip=f"A text from another node, used while {name}_description is empty.",
                    )
                    for name in ("source", "edit")
                ),
            ],
            outputs=[
                io.Conditioning.Output("source", tooltip="The encoded source description."),
                io.Conditioning.Output("edit", tooltip="The encoded edit description."),
                EditTokensType.Output("edit_tokens"),
                io.String.Output("text", tooltip="The words found and their token positions, as text."),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip: CLIP,
        source_description: str,
        edit_description: str,
        words: str = "",
        source_text: str | None = None,
        edit_text: str | None = None,
    ) -> io.NodeOutput:
        source_description = source_description if source_description.strip() else source_text or ""
        edit_description = edit_description if edit_description.strip() else edit_text or ""
        tokens = find_tokens(clip, source_description, edit_description, words)
        source, edit = (
            clip.encode_from_tokens_scheduled(clip.tokenize(text))
            for text in (source_description, edit_description)
        )
        text = _text(clip, tokens, source_description, edit_description)
        return io.NodeOutput(source, edit, tokens, text)


class DescEditFindTokens(io.ComfyNode):
    """Node: `patches.unify.tokens.find_tokens`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditFindTokens",
            display_name="Find Edit Tokens",
            category=UNIFY,
            description=(
                "Finds the tokens of the edit description that carry the edit: by default the words that "
                "are not in the source description. For a text that another node encodes: wire the same "
                "texts there. Describe Edit does both."
            ),
            search_aliases=[*ALIASES, "token index", "word position"],
            inputs=[
                _CLIP,
                io.String.Input("source_description", force_input=True, tooltip=_SOURCE),
                io.String.Input("edit_description", force_input=True, tooltip=_EDIT),
                _WORDS,
            ],
            outputs=[
                EditTokensType.Output("edit_tokens"),
                io.String.Output("text", tooltip="The words found and their token positions, as text."),
            ],
        )

    @classmethod
    def execute(
        cls, clip: CLIP, source_description: str, edit_description: str, words: str = ""
    ) -> io.NodeOutput:
        tokens = find_tokens(clip, source_description, edit_description, words)
        return io.NodeOutput(tokens, _text(clip, tokens, source_description, edit_description))


def _text(clip: CLIP, tokens: EditTokens, *descriptions: str) -> str:
    """The words found, and those that the Tiny Studio does not know; also shown on the node."""
    text, unknown = tokens.describe(), unknown_words(clip, *descriptions)
    if unknown:
        text += f"\nnot known to the Tiny Studio: {', '.join(unknown)}"
    show_text(text)
    return text


NODES = [DescEditDescribe, DescEditFindTokens, DescEditDescribePrompt]
