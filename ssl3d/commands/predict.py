"""`ssl3d predict`: scans in, predictions of fine-tuned models out."""

from __future__ import annotations

from collections.abc import Sequence

from ssl3d.prediction.options import PredictOptions

summary = "predict scans with models that ssl3d finetune kept"

EPILOG = """Nothing is predicted twice: a call that was killed goes on where it was, and several calls
with one --out share the scans. A scan that cannot be used is set aside by name, in rejected.csv.
OUT/predictions.csv has the classes and values, the volumes of structures in ml, or the boxes. ssl3d view
OUT makes a page of the predictions beside the truth."""


def main(argv: Sequence[str]) -> int:
    """Predict the scans and return the exit status: 1 where a scan was set aside."""
    from ssl3d.amounts import count_of
    from ssl3d.config import parse

    options = parse("ssl3d predict", PredictOptions, argv, epilog=EPILOG).options
    from ssl3d.prediction.run import predict

    summary = predict(options)
    aside = f", {count_of(len(summary.rejected), 'scan')} set aside (see {options.out / 'rejected.csv'})"
    print(
        f"{options.out}: {count_of(summary.predicted, 'volume')} predicted"
        + (aside if summary.rejected else "")
    )
    for path in summary.files:
        print(f"table: {path}")
    return 1 if summary.rejected else 0
