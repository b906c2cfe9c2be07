"""What the method files share. Imported before torch: OpenMP reads this setting once, when torch loads it."""
import os

# Threads that wait by spinning for long take each other's cores: beside a busy neighbour on two cores, training was several times
# slower. A short spin keeps nearly all of the speed of a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
