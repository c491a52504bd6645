"""jaxvla: asynchronous RL post-training of vision-language-action policies in JAX.

Importing this package initialises no JAX backend and sets no environment variable.
"""

__version__ = "0.1.0"
