"""UnifyEdit's balance for the six edit types of Unify-Bench (arXiv 2504.05594, Table I), with simple prompts
("a red circle") and complex ones (whole scenes).

The paper's values are not published. These were chosen on the Tiny Studio's tuning cases
(`python dev.py unify-study --tune`), where only a style wanted other values than the rest, less structure,
and simple and complex prompts could not be told apart.
"""

from __future__ import annotations

from .balance import Balance

CUSTOM = "custom"
_LAYOUT = Balance(beta1=1.0, k1=1.0, beta2=0.3, k2=2.0)
_STYLE = Balance(beta1=0.3, k1=1.0, beta2=0.3, k2=2.0)
PRESETS: dict[str, Balance] = {
    "colour, simple": _LAYOUT,
    "colour, complex": _LAYOUT,
    "texture, simple": _LAYOUT,
    "texture, complex": _LAYOUT,
    "object, simple": _LAYOUT,
    "object, complex": _LAYOUT,
    "background, simple": _LAYOUT,
    "background, complex": _LAYOUT,
    "style, simple": _STYLE,
    "style, complex": _STYLE,
    "face, simple": _LAYOUT,
    "face, complex": _LAYOUT,
}
