"""What the paper's tables and figures show, measured on this machine: ``make paper``."""
