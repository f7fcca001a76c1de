"""Backend `cpu`: `backend` calls the C++ engine of csrc/, `extension` finds and loads its library."""
