//! Medians, spreads and geometric means.

/// Some measurements of one thing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample(pub Vec<f64>);

impl Sample {
    fn sorted(&self) -> Vec<f64> {
        let mut values = self.0.clone();
        values.sort_by(f64::total_cmp);
        values
    }

    /// The median; `None` of nothing.
    pub fn median(&self) -> Option<f64> {
        let values = self.sorted();
        let middle = values.len() / 2;
        let upper = *values.get(middle)?;
        match values.len() % 2 {
            1 => Some(upper),
            _ => Some((*values.get(middle.checked_sub(1)?)? + upper) / 2.0),
        }
    }

    /// Smallest and largest.
    pub fn range(&self) -> Option<(f64, f64)> {
        let values = self.sorted();
        Some((*values.first()?, *values.last()?))
    }

    /// Distance of smallest and largest in percent of the median.
    pub fn spread_percent(&self) -> Option<f64> {
        let (low, high) = self.range()?;
        Some((high - low) / self.median()? * 100.0)
    }
}

/// The geometric mean; `None` of nothing or of values that are not positive.
pub fn geometric_mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() || values.iter().any(|value| *value <= 0.0) {
        return None;
    }
    Some((values.iter().map(|value| value.ln()).sum::<f64>() / values.len() as f64).exp())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(Sample(vec![3.0, 1.0, 2.0]).median(), Some(2.0));
        assert_eq!(Sample(vec![4.0, 1.0, 2.0, 3.0]).median(), Some(2.5));
        assert_eq!(Sample::default().median(), None);
        assert_eq!(Sample(vec![2.0, 1.0, 3.0]).spread_percent(), Some(100.0));
    }

    #[test]
    fn geometric_means_multiply() {
        let mean = geometric_mean(&[1.0, 4.0]).unwrap();
        assert!((mean - 2.0).abs() < 1e-12);
        assert_eq!(geometric_mean(&[]), None);
        assert_eq!(geometric_mean(&[1.0, 0.0]), None);
    }
}
