"""`ssl3d embed`: volumes to embeddings, with a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence

summary = "embed volumes with a frozen encoder, into an HDF5 file"


def main(argv: Sequence[str]) -> int:
    """Writes the embeddings."""
    from ssl3d.commands.embedding import EmbedOptions, embed_collection
    from ssl3d.config import parse
    from ssl3d.specs import pooled_by

    options = parse("ssl3d embed", EmbedOptions, argv).options
    from ssl3d.data.open import open_data_for
    from ssl3d.specs import encoder_from

    encoder = pooled_by(options.pool, encoder_from(options.encoder), options.encoder)
    count = embed_collection(encoder, open_data_for([encoder], options.data), options)
    print(f"{count} embeddings of length {encoder.embed_dim} in {options.out}")
    return 0
