"""Starting the processes of a run and seeing them through."""
