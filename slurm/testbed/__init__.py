"""A real Slurm on one machine, for trying the suite out and for its tests: `python -m slurm.testbed up`."""
