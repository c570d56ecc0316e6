"""Raw ids to table rows: a stable hash or identity, as each feature says."""

import numpy as np
from numpy.typing import NDArray

from exfm.data.columns import SparseInput
from exfm.data.errors import UserError
from exfm.data.hashing import hash64, salt_of
from exfm.data.schema import Schema
from exfm.embeddings.config import FeaturesConfig, SparseFeature, TableConfig, Tables

I64 = NDArray[np.int64]


def sparse_inputs(
    features: FeaturesConfig, tables: Tables, schema: Schema, once: tuple[str, ...] = ()
) -> tuple[SparseInput, ...]:
    """What the reader must know of every sparse feature. once: those whose repeated lists are looked up once per batch.

    UserError for a column that the stream lacks, and for a name of `once` that is no unweighted feature.
    """
    unweighted = [f.name for f in features.sparse if not f.weighted]
    if unknown := [name for name in once if name not in unweighted]:
        raise UserError(
            f"stream.once names {', '.join(unknown)}, which is no unweighted sparse feature; it may name {', '.join(unweighted)}"
        )
    inputs = []
    for feature in features.sparse:
        column = schema.sparse_column(feature.source)
        if feature.weighted and not column.weights:
            raise UserError(
                f"feature '{feature.name}' is weighted, but column '{column.name}' has no weights in the schema"
            )
        to_rows = IdMap(feature, tables[feature.table])
        weights = column.weights if feature.weighted else None
        inputs.append(SparseInput(feature.name, column.name, to_rows, weights, feature.name in once))
    return tuple(inputs)


class IdMap:
    """The id mapping of one feature. Features that share a table share its hash, so that an id has one row."""

    def __init__(self, feature: SparseFeature, table: TableConfig) -> None:
        self.feature, self.rows = feature, table.rows
        self.salt = salt_of("ids", feature.table)

    def __call__(self, values: I64, lengths: NDArray[np.integer], example_ids: I64) -> I64:
        """values [n] raw ids, lengths [b] ids per example, example_ids [b] -> rows [n].

        UserError names feature, table and the first offending example for an id outside an identity table.
        """
        if self.feature.ids == "hash":
            hashed = hash64(values, self.salt)
            rows = np.uint64(self.rows)
            return (hashed - hashed // rows * rows).view(np.int64)  # the remainder, by NumPy's faster division
        if len(values) and values.view(np.uint64).max() >= self.rows:  # a negative id is a large one there
            first = int(np.argmax((values < 0) | (values >= self.rows)))
            example = np.repeat(example_ids, lengths)[first]
            raise UserError(
                f"feature '{self.feature.name}': id {values[first]} of example {example} is outside the identity table "
                f"'{self.feature.table}' of {self.rows} rows; raise tables.{self.feature.table}.rows or use ids: hash"
            )
        return values
