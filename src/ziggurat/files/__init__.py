"""Safe reading of untrusted files, and atomic writing. Doesn't depend on PEFT."""
