//! Who serves a queue: a Python callable, or something native.

use std::sync::Arc;

use pyo3::prelude::*;
use pyvirtio_core::Handler;

use crate::blk::BlkPlane;
use crate::errors::{GuestError, StaleChain};
use crate::logging;
use crate::queue::VirtQueue;

/// The handler an object of Python stands for, called with `vq`.
pub fn handler(object: &Bound<'_, PyAny>, vq: &Bound<'_, VirtQueue>) -> Arc<dyn Handler> {
    native(object)
        .unwrap_or_else(|| Arc::new(PythonHandler { callable: object.clone().unbind(), vq: vq.clone().unbind() }))
}

/// A handler that runs without Python.
fn native(object: &Bound<'_, PyAny>) -> Option<Arc<dyn Handler>> {
    object.cast::<BlkPlane>().ok().map(|plane| plane.get().handler())
}

/// Calls Python once per pass.
struct PythonHandler {
    callable: Py<PyAny>,
    vq: Py<VirtQueue>,
}

impl Handler for PythonHandler {
    fn handle(&self, vq: &Arc<pyvirtio_core::VirtQueue>) {
        Python::attach(|py| {
            if let Err(error) = self.callable.call1(py, (&self.vq,)) {
                raised(py, error, vq);
            }
        });
    }
}

/// Whose fault an exception of a handler is decides what happens (see `pyvirtio.errors`).
fn raised(py: Python<'_>, error: PyErr, vq: &pyvirtio_core::VirtQueue) {
    if error.is_instance_of::<StaleChain>(py) {
        return;
    }
    let (name, value) = (vq.name(), error.value(py).to_string());
    if error.is_instance_of::<GuestError>(py) {
        vq.state().fail(&format!("{name}: {value}"));
        return;
    }
    // The traceback first: whoever is told of the failure may look for it.
    logging::exception(py, &format!("{}: {name}: exception in the handler", vq.state().name()), &error);
    let kind = error.get_type(py).name().map_or_else(|_| String::from("an exception"), |kind| kind.to_string());
    vq.state().fail(&format!("{name}: the handler raised {kind}: {value}"));
}
