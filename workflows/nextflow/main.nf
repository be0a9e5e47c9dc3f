// Segments every slide in a task of its own; see workflows/README.md.  Not run yet.
nextflow.enable.dsl = 2

params.slides = 'slides/*'
params.out = 'results'
params.flags = ''

process SEGMENT {
    tag "${slide.name}"
    errorStrategy 'retry'
    maxRetries 2
    publishDir "${params.out}/reports", mode: 'copy'

    input:
    path slide, stageAs: 'slides/*'

    output:
    path "${slide.name}.json"

    script:
    // The labels go straight to the output folder, where a retry finds the blocks that are done.
    """
    cellseg-batch run "\$(readlink -f '${slide}')" --output '${file(params.out).toAbsolutePath()}' \\
        --threads ${task.cpus} --json '${slide.name}.json' ${params.flags}
    """
}

workflow {
    SEGMENT(Channel.fromPath(params.slides, type: 'any', checkIfExists: true))
}
