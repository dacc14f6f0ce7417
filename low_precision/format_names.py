"""What other projects call our formats, for errors that lead to the right name. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable

from low_precision import p3109
from low_precision.errors import nearest

# In small letters, and without what is no letter or digit. None: nothing here is alike.
ELSEWHERE: dict[str, str | None] = {
    **dict.fromkeys(("fp32", "f32", "float", "single", "binary32"), "float32"),
    **dict.fromkeys(("f16", "binary16", "float16ieee", "ieeefloat16", "ieeehalf", "ieeefp16"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat", "brainfloat", "brainfloat16"), "bfloat16"),
    **dict.fromkeys(("tensorfloat32", "tensorfloat", "fp19"), "tf32"),
    **dict.fromkeys(("fp8", "f8", "hf8", "e4m3", "e4m3fn"), "float8_e4m3fn"),
    **dict.fromkeys(("bf8", "e5m2"), "float8_e5m2"),
    **{name: f"float8_{name}" for name in ("e5m2fnuz", "e4m3fnuz")},
    **dict.fromkeys(("fp6", "f6", "e3m2", "e3m2fn"), "float6_e3m2fn"),
    **dict.fromkeys(("e2m3", "e2m3fn"), "float6_e2m3fn"),
    **dict.fromkeys(("fp4", "f4", "float4", "e2m1", "e2m1fn", "e2m1fnx2"), "float4_e2m1fn"),
    **dict.fromkeys(("mxfp8", "mxfp8e4m3fn"), "mxfp8_e4m3"),
    **dict.fromkeys(("mxfp6", "mxfp6e3m2fn"), "mxfp6_e3m2"),
    **dict.fromkeys(("mxfp4e2m1", "mxfp4e2m1fn"), "mxfp4"),
    **dict.fromkeys(("fp64", "f64", "float64", "double", "e8m0fnu"), None),
}
NOTES = {  # where the name alone would mislead
    "fp16": "; float16 is qtorch's 1-6-9, IEEE half is fp16",
    "float8_e4m3fn": "; OCP's E4M3, up to 448, is float8_e4m3fn, and its E5M2 float8_e5m2; e4m3 is IEEE-like, up to"
    " 240; float8 is qtorch's 1-5-2",
}
_MODULES = ("torch", "numpy", "np", "jax.numpy", "jnp", "tf", "ml_dtypes")  # whose float16 is IEEE half


def nearest_format(name: str, known: Iterable[str]) -> str | None:
    """The format that `name`, which is none of `known`, most likely means; None where nothing is alike."""
    module, _, word = name.lower().rpartition(".")
    letters = _letters(word if module in _MODULES else name)
    if module in _MODULES and letters == "float16":
        return "fp16"
    if match := re.fullmatch("(?:fp|float|f|bf|hf)?[468]?(e([0-9])m([0-9]{1,2}))(fn|fnu|fnuz|fnx2)?", letters):
        letters, is_plain = match[1] + (match[4] or ""), not match[4]
        is_any = 2 <= int(match[2]) <= 8 and int(match[3]) <= 23 and match[3] == str(int(match[3]))
        if is_plain and is_any and letters not in ELSEWHERE:
            return letters  # eXmY, which is any other width
    if standard := p3109.elsewhere(letters):
        return standard
    if letters in ELSEWHERE:
        return ELSEWHERE[letters]
    by_letters = {_letters(one): one for one in known}
    return by_letters.get(letters) or nearest(name, by_letters.values())


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
