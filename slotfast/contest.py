"""What the contest fixed: sizes, its validation stream, and when a record counts. Source: openai/parameter-golf."""

CAP_BYTES = 16_000_000  # code and model of an entry; decimal megabytes
VALIDATION_DOCUMENTS = 50_000
VALIDATION_BYTES = (151_070_000, 151_080_000)  # the least and the most that its byte rule counts
VALIDATION_WINDOWS = 969_057  # of length 2048 and stride 64
VALIDATION_TOKENS = 64 * VALIDATION_WINDOWS  # a stride for each; what the first window charges beyond is left out
GPUS = 8  # that an evaluation may use
THRESHOLD_NATS = 0.005  # by which a record must beat the one before
LARGEST_P = 0.01  # of the test that shows it

# What an evaluation must keep to for its score to be honest, in the words of people who score.
CONDITIONS = {
    "C1": "only earlier tokens matter",
    "C2": "whole distributions, fixed before their token is seen",
    "C3": "charged before learned from",
    "C4": "one pass, left to right, each token once",
}
LEGEND = "; ".join(f"{name}: {meaning}" for name, meaning in CONDITIONS.items())


def projected_seconds(total: int, done: int, seconds: float, ranks: int = 1) -> float:
    """Seconds of the validation stream on the contest's GPUs, each with an equal piece of it, at the pace of a run.

    Args:
        total: VALIDATION_WINDOWS or VALIDATION_TOKENS.
        done: windows or tokens of the run, on all of its ranks, >= 1.
        seconds: that these took, the ranks side by side.
        ranks: of the run, a GPU each.
    """
    return total / done * seconds * ranks / GPUS
