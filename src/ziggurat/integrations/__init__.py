"""Other programs' doors: one file for each program, loaded by that program or by its command alone."""
