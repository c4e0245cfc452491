"""Sweeps: trials of the flags of pretrain or finetune by Optuna, each in a process of its own."""
