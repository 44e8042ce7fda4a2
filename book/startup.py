"""What every kernel of the book runs first."""

import gc

# Tracing makes many small objects that stay, and Python looks through all of them time
# and again for garbage.
gc.set_threshold(100_000, 20, 20)
