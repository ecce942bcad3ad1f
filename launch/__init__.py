"""The one place that puts the parts together: configuration, CLI, data, telemetry."""
