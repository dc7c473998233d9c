"""What will not work together, and why, before it fails: `checks` finds it, `facts` is the table behind it."""
