"""What a flow run shows in Prefect beside its tasks: how far it is, and how the models compare."""

from __future__ import annotations

import re

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact

from stacklm.files import read_json
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import stage


class Progress:
    """A bar of `total` stages."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._artifact = create_progress_artifact(progress=0, key="stages", description=f"0 of {total} stages")

    def advance(self) -> None:
        self._done += 1
        update_progress_artifact(self._artifact, 100 * self._done / self._total, f"{self._done} of {self._total} stages")


def show_comparison(project: Project) -> None:
    """The comparison's figures as a table, and its report without the pictures, which lie beside it on the disk."""
    files = stage("compare").paths(stage("compare").writes, project.root)
    comparison = read_json(files["comparison"])
    table = [
        {
            "model": name,
            "parameters": facts["total_parameters"],
            "training tokens": facts["tokens"],
            "training FLOPs": facts["training_flops"],
            "valid loss": facts["valid"]["loss"],
            "test loss": facts["test"]["loss"],
            "test bits per byte": facts["test"]["bits_per_byte"],
        }
        for name, facts in comparison["models"].items()
    ]
    create_table_artifact(table, key="comparison", description=comparison["finding"])
    report = (files["report"] / "report.md").read_text(encoding="utf-8")
    create_markdown_artifact(re.sub(r"!\[[^\]]*\]\([^)]*\)\n*", "", report), key="report", description="Report of the comparison")
