"""What is fast, by how much, on which machine: benches, measured roofs, the static report, committed results."""
