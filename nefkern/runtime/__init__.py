"""What every part stands on: processes, devices, files, progress, errors, the command line."""
