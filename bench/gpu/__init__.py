"""What ``python -m bench.gpu_check`` runs: stages of cases, each in processes of their own."""
