"""Code generated from protos/moe_ray.proto by `make protos`; a test checks that it is fresh."""
