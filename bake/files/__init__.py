"""Files in folders: which may be read, who writes, what is left when a process is killed."""
