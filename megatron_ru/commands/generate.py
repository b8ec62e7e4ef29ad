"""Continue a text with a trained model.

    megatron-ru generate --load demo/checkpoint --prompt 'берёза —'

Loads the latest torch_dist checkpoint of pretrain_gpt into one process, whatever parallel layout saved it. Variant,
sizes and tokenizer are those of the run that saved it; the two flags are for a tokenizer that has moved, and for
saying which variant is expected. Prints the prompt and its continuation.
"""

import argparse

NAME = "generate"
SUMMARY = "continue a text with a checkpoint of pretrain_gpt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, the prompt and how tokens are drawn."""
    parser.add_argument("--load", required=True, metavar="DIR", help="the folder that pretrain_gpt --save wrote to")
    parser.add_argument(
        "--tokenizer-model", metavar="FILE", help="sentencepiece .model or tokenizer.json (default: the run's own)"
    )
    parser.add_argument("--ru-variant", metavar="NAME", help="the variant expected (default: the run's own)")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="the text to continue; may be given several times (default: empty, a new document)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="tokens at most (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T",
        help="0 takes the likeliest token, higher is wilder (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P",
        help="draw among the likeliest tokens that hold this probability (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="of the draw (default: %(default)s)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the continuation. Returns 0; raises UserError."""
    from megatron_ru.foundation.quiet import held_output

    with held_output():
        from megatron_ru.engines.generation import load_for_generation
        from megatron_ru.evaluation.sampling import SamplingSettings, continue_text

        settings = SamplingSettings(
            tokens=arguments.tokens, temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed
        )
        loaded = load_for_generation(arguments.load, arguments.tokenizer_model, arguments.ru_variant, arguments.device)
        texts = [
            prompt + continue_text(loaded.next_logits, loaded.tokenizer, prompt, loaded.context, settings)
            for prompt in arguments.prompt or [""]
        ]
    print("\n\n".join(texts))
    return 0
