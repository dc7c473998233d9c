"""Methods by tasks by seeds: runs that are never repeated, a live table, paired differences, plots."""
