"""What the package is measured with: one registry of contenders, one way to time, one report."""
