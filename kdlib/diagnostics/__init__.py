"""Why a distillation goes wrong, and what it will cost: doctor, self-test, memory."""
