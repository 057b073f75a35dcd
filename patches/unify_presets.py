"""UnifyEdit's balance for the six edit types of Unify-Bench (arXiv 2504.05594, Table I), with simple prompts
("a red circle") and complex ones (whole scenes).

The paper's values are not published.
"""

from __future__ import annotations

from .unify_balance import Balance

CUSTOM = "custom"
PRESETS: dict[str, Balance] = {
    "colour, simple": Balance(),
    "colour, complex": Balance(),
    "texture, simple": Balance(),
    "texture, complex": Balance(),
    "object, simple": Balance(),
    "object, complex": Balance(),
    "background, simple": Balance(),
    "background, complex": Balance(),
    "style, simple": Balance(),
    "style, complex": Balance(),
    "face, simple": Balance(),
    "face, complex": Balance(),
}
