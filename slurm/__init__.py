"""Running the suite on Slurm: profiles, plain sbatch scripts, and a test cluster of one machine."""
