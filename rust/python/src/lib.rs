//! `pyvirtio._core`: the core as Python sees it. Converts types, errors and threads, and decides nothing.

use pyo3::prelude::*;

#[pymodule]
mod _core {}
