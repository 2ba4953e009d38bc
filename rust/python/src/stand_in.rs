//! Stand-ins until the I/O thread's loop and the blk plane are here: enough to import the package and to serve.


use pyo3::exceptions::PyNotImplementedError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::queue::VirtQueue;

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct BlkPlane {}

#[pymethods]
impl BlkPlane {
    #[new]
    #[pyo3(signature = (*_arguments, **_options))]
    fn new(_arguments: &Bound<'_, PyTuple>, _options: Option<&Bound<'_, PyDict>>) -> Self {
        Self {}
    }

    fn __call__(&self, _vq: &VirtQueue) -> PyResult<()> {
        Err(PyNotImplementedError::new_err("the blk plane is not here yet"))
    }
}
