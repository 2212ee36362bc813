//! Who looks at the inputs of a layer.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use burn::tensor::Tensor;

type See = dyn FnMut(Tensor<2>) + Send;

/// Sees every input of a layer, `[tokens, inputs]`. Copies see for the same one.
#[derive(Clone)]
pub struct Tap(Arc<Mutex<See>>);

impl Tap {
    /// Calls `see` with each input.
    pub fn new(see: impl FnMut(Tensor<2>) + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(see)))
    }

    /// Shows an input.
    pub fn show(&self, x: Tensor<2>) {
        (self.0.lock().unwrap_or_else(PoisonError::into_inner))(x);
    }
}

impl fmt::Debug for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tap")
    }
}
