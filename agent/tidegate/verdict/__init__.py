"""Pure: intent and evidence of one service meet here, and give READY, NOT READY or UNKNOWN.

Nothing in this package performs I/O or reads a clock; it imports the shared vocabulary and nothing
else of tidegate. `evidence` is what an agent must bring, `readiness` the judgement, `steps` what a
person does next.
"""
