"""The measured programs, a process each: `python -m benchmarks.programs.NAME JOB`."""
