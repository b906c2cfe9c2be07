"""What the method files share. Imported before torch: OpenMP reads this setting once, when torch loads it."""
import os

# Threads that wait by spinning take each other's cores: with two threads and one busy neighbour on two cores a training step of the
# toy run took 1,360 ms instead of 200.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
