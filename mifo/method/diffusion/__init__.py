"""The diffusion process: noise schedule, denoising loss, DDIM steps and classifier-free guidance."""
