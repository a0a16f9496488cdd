"""3. ANN to SNN: surgery on the graph, calibration, coding."""
