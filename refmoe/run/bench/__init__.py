"""Measure speed beside what the memory gives: every figure is a ratio to a rate of the same run.

    kernels    each format's rows times tokens, GB/s of weights over the rate of plain reading
    decode     one token after another: tok/s, and bytes a token times tok/s over the same rate
    prefill    a prompt: tok/s
    peers      a checkpoint through transformers and llama.cpp beside refmoe
    store      decoding with weights larger than memory, over the disk's own rate
    sweep      many rows layer by layer, over the disk's own rate
    gpu        kernels over a copy on the device, and tokens a second by placement

Each file has one `measure_…`, which returns the document that `--json` prints, and one `format_…`,
which returns its lines for people.
"""
