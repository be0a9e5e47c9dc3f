"""Where the time of a run goes: a bounded sample is run, each stage is measured alone, the bottleneck is named."""
