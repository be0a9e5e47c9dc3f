"""Segment one slide; a run that was killed goes on where it stopped."""

import shlex

from snakemake.shell import shell

slide, report = shlex.quote(str(snakemake.input[0])), shlex.quote(str(snakemake.output.report))  # noqa: F821
output = shlex.quote(str(snakemake.params.output))  # noqa: F821
shell(
    f"cellseg-batch run {slide} --output {output} --threads {snakemake.threads} --json {report} "  # noqa: F821
    f"{snakemake.params.get('flags', '')} {snakemake.log_fmt_shell()}"  # noqa: F821
)
