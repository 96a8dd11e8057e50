"""Messages of the Open Inference Protocol's gRPC form, generated: CONTRIBUTING.md says how."""
