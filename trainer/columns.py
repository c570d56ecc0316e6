"""What a job reads of every example."""

from exfm.data.columns import BatchColumns
from exfm.data.manifest import Stream
from exfm.distillation.supervision import logit_column
from exfm.embeddings.ids import sparse_inputs
from exfm.trainer.config import JobConfig


def supervision_column(number: int, task: str) -> str:
    """Where the logits of the student's teacher of that number for the student's task lie beside the features."""
    return f"{number}/{logit_column(task)}"


def batch_columns(config: JobConfig, stream: Stream) -> BatchColumns:
    """What the job reads of every example."""
    learn = config.distillation.learn
    supervision: tuple[tuple[str | None, ...], ...] = ()
    if learn is not None:
        supervision = tuple(
            tuple(supervision_column(s, task) if teacher.task(task) else None for task in config.heads.tasks)
            for s, teacher in enumerate(learn.all_teachers)
        )
    return BatchColumns(
        schema=stream.schema,
        dense=tuple((d.name, d.log1p) for d in config.features.dense),
        sparse=sparse_inputs(config.features, config.tables, stream.schema, config.stream.once),
        labels=config.heads.tasks,
        domains=config.stream.domains,
        own_domain=config.stream.domain,
        supervision=supervision,
    )
