"""What the method files share. Imported before torch: OpenMP reads this setting once, when torch loads it."""
import os

# Threads that wait by spinning for long take each other's cores. A training step of the toy run, two threads on two cores: 150 ms
# when all is quiet and 1,360 ms beside a busy neighbour; so limited, 180 ms and 460 ms.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
