"""Around the planner: models, machines and measurements from files, and tables and plots for people."""
