"""The suite on Slurm: what a run still lacks, how that is submitted, and how its jobs behave."""
