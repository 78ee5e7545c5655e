"""The paper's experiments: its tables, the commands they become, the runs, and the results."""
