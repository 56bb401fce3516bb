"""Diffusion: noise levels (`process`), models that undo noise (`denoiser`), rules that steer them (`guidance`), one
step (`steps`), all of them (`sampling`), and rules inside a pipeline that is called as always (`attach`)."""
